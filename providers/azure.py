"""Azure OpenAI: the key in a header of its own, and deployments in place of models."""

from typing import ClassVar
from urllib.parse import quote

from .http import HttpProvider
from .profile import Profile


class Azure(HttpProvider):
    """A resource of one's own; a route's `model` is the name of a deployment.

    With a base URL that ends in `/openai/v1` it is asked as OpenAI is. With the option
    `api_version`, and a base URL that ends in `/openai`, by the older path of the deployment.
    """

    profile: ClassVar[Profile] = Profile(
        api_key_env="AZURE_OPENAI_API_KEY",
        key_header="api-key",
        key_prefix="",
        encoding_format="base64",
        accepts_tokens=True,
        dimensions_field="dimensions",
        sends_user=True,
        names_models=False,
        options={"api_version": None},
    )

    def path(self, model: str) -> str:
        """Return the path of a deployment."""
        version = self.options.get("api_version")
        if version is None:
            return "/embeddings"
        deployment = quote(model, safe="")
        return f"/deployments/{deployment}/embeddings?api-version={quote(str(version), safe='')}"
