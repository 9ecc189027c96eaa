"""`from turbocompile.evaluate import evaluate_videos`: whether videos of moving digits show what their prompts say."""

from turbocompile.wan_mini.evaluate import evaluate_videos

__all__ = ["evaluate_videos"]
