"""`from turbocompile.evaluate import evaluate_videos` judges whether videos of moving digits match their prompts."""

from turbocompile.wan_mini.evaluate import evaluate_videos

__all__ = ["evaluate_videos"]
