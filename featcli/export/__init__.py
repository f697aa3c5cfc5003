"""Other files: an open dump comes in; one file, a folder of arrays or lines on stdout go out."""
