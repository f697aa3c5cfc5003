"""A run as a whole: a spec comes in; the package plans, claims the dump, hires workers, and gives an outcome out."""
