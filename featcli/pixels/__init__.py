"""Turn a file into pixels: upright RGB of the wanted size, or the reason why there is none."""
