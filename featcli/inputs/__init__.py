"""What was named: folders, archives, lists and URLs come in; the images of a run in row order go out."""
