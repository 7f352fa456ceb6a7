"""An object in a file: written under no name, put in its place as a whole, loaded by mapping."""
