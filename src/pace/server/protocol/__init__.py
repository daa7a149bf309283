"""The JSON of the API as types: what they don't say is refused, and the OpenAPI description is made from them."""
