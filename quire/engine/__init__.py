"""Requests, scheduler, the step loop, the engine process, its wire format and its clients."""
