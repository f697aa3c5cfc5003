"""The machine: questions about cores, memory, devices, files and schedulers come in; answers with reasons go out."""
