"""What can be asked: options as text or keywords come in; frozen specs whose values are checked go out."""
