"""A run as a whole: a spec comes in, is planned, claims its dump and hires workers; an outcome goes out."""
