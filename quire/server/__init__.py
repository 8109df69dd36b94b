"""The HTTP server: OpenAI's API over an AsyncEngine. Entry points: `app.build_app`, `serve.run`."""
