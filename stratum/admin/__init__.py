"""The admin listener: health and metrics, and the watch that notes since when what is wrong and tells people."""
