"""Checkpoints that are whole or refused: directories of safetensors and JSON under a manifest of sizes and SHA-256.

A checkpoint is written beside its place, synced, and renamed into it, so that a kill or a full disk at any moment
leaves the one before. Nothing is unpickled, and nothing outside the checkpoint's directory is read. For people:
`python -m awp_engine.checkpoint verify|list|export DIR`.
"""

from awp_engine.checkpoint._files import (
    CheckpointError,
    atomic_write_text,
    naming,
    read_file,
    remove_leftovers,
    sync_directory,
    temporary_beside,
)
from awp_engine.checkpoint._load import Checkpoint, damage, load, load_latest
from awp_engine.checkpoint._model_file import content_hash, export_model, read_model
from awp_engine.checkpoint._names import FORMAT, Position, checkpoint_name, names, position
from awp_engine.checkpoint._save import Retention, save
from awp_engine.checkpoint._writer import Writer

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
