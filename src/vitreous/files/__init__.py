"""Files and folders that are never half written, never mixed, and never more than they seem."""

from .writing import (
    MANIFEST,
    check,
    digest,
    folder_aside,
    forget,
    manifest,
    replaceable,
    sweep,
    writable,
    write_manifest,
    write_whole,
)

__all__ = [
    "MANIFEST",
    "check",
    "digest",
    "folder_aside",
    "forget",
    "manifest",
    "replaceable",
    "sweep",
    "writable",
    "write_manifest",
    "write_whole",
]
