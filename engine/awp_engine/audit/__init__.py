"""Audits of a trained model and of its data: what it leans on, what an edit could hide, what does not belong."""
