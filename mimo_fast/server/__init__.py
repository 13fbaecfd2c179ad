"""An HTTP and WebSocket server in the OpenAI API's dialect: `mimo-fast serve`."""
