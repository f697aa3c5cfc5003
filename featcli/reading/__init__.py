"""Reading back: the folder of a dump comes in; arrays by stage, keys, labels and torch datasets go out."""
