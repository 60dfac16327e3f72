"""Runs from configs: data sets, architectures, the commands and what they write."""
