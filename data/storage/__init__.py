"""Bytes on disks and networks: atomic writes, retries, full disks, remote files, strict tars."""
