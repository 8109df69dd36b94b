"""Speculation: drafts of what may come next, and what of them the target model accepts."""
