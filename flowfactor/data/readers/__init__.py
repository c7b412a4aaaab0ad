"""Readers of files: published data sets, and anyone's own sequences."""
