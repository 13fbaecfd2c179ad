"""Metadata is in pyproject.toml; this file is where the native kernels in csrc/ are built."""

from setuptools import setup

setup()
