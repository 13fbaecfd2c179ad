"""Recordings: files and decoding limits, resampling, log-mel."""
