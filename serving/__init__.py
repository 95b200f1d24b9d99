"""What existing engines need to serve these models; `docs/serving.md` says which engine is for what."""
