"""The command line: questions about one video, and files of questions about many."""
