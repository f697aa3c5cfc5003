"""From a file to pixels: images come in; upright RGB of the wanted size goes out, or the reason why not."""
