"""What people look at: checkpoints, dumps and pictures come in; facts, sheets and pages go out."""
