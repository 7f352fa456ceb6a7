"""What is put under multiprocessing while oobpickle is installed: one file for each thing."""
