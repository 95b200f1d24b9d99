"""What existing engines need to serve the family: the vLLM plug-in and Ray batch."""
