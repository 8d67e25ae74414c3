"""Checkpoints that are whole or refused: directories of safetensors and JSON under a manifest of sizes and SHA-256.

A checkpoint is written beside its place, synced, and renamed into it, so that a kill or a full disk at any moment
leaves the one before. Nothing is unpickled, and nothing outside the checkpoint's directory is read. For people:
`awp checkpoint verify|list|export DIR`.
"""

from awp_engine.checkpoint.background import Writer
from awp_engine.checkpoint.files import CheckpointError, read_file
from awp_engine.checkpoint.layout import FORMAT, Position, checkpoint_name, names, position
from awp_engine.checkpoint.model_file import content_hash, export_model, read_model
from awp_engine.checkpoint.read import Checkpoint, damage, load, load_latest
from awp_engine.checkpoint.write import Retention, save
from awp_engine.files.atomic import atomic_write_text, naming, remove_leftovers, sync_directory, temporary_beside

__all__ = [
    "FORMAT",
    "Checkpoint",
    "CheckpointError",
    "Position",
    "Retention",
    "Writer",
    "atomic_write_text",
    "checkpoint_name",
    "content_hash",
    "damage",
    "export_model",
    "load",
    "load_latest",
    "names",
    "naming",
    "position",
    "read_file",
    "read_model",
    "remove_leftovers",
    "save",
    "sync_directory",
    "temporary_beside",
]
