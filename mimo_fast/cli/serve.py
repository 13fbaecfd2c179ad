"""`mimo-fast serve`: the model behind the OpenAI API's speech endpoints."""

import argparse

import uvicorn

from mimo_fast.checkpoint.embedded import NAME
from mimo_fast.cli.common import load_model
from mimo_fast.server.app import create_app
from mimo_fast.server.service import Service
from mimo_fast.server.settings import Settings


def run(args: argparse.Namespace) -> int:
    settings = Settings(host=args.host, port=args.port, api_key=args.api_key)
    model = load_model(args, max_batch=args.streams)
    service = Service(model, args.served_name or NAME)
    uvicorn.run(
        create_app(service, settings),
        host=settings.host,
        port=settings.port,
        ws="websockets-sansio",
        ws_max_size=settings.max_message_bytes,
        log_level="warning",
    )
    service.close()
    return 0
