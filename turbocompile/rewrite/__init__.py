"""Normal form, the matcher, and the pipeline that runs the passes."""
