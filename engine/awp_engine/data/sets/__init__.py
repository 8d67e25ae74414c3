"""Readers of data sets and of files of images, none of which runs what it reads."""
