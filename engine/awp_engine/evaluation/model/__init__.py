"""The model that is measured or used: a run's, or anybody's."""
