"""Files and text: written whole, one writer a directory, and shown as they are. Imports no torch."""
