"""The section `cache.shared`: the Redis that several nodes keep their vectors in together."""

from collections.abc import Iterator
from typing import Annotated, Literal

from embedding_proxy.cache.shared import address
from pydantic import AfterValidator, Field, model_validator

from .errors import Problem, refuse
from .fields import CertificateFile, Name, Number, Section, VariableName, Whole


def _redis_url(value: str) -> str:
    address.parse(value)
    return value


RedisUrl = Annotated[str, AfterValidator(_redis_url), Field(repr=False)]
"""It may hold a password, if a variable of the environment stands for it."""


class Shared(Section):
    """Where the shared tier is, who asks it, and what it may take."""

    url: RedisUrl
    username: Name | None = None
    password_env: VariableName | None = None
    sentinel_password_env: VariableName | None = None
    ca_file: CertificateFile | None = None
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,64}$")] = "embedding-proxy"
    timeout_ms: Annotated[Number, Field(gt=0, le=1000)] = 50
    max_connections: Annotated[Whole, Field(ge=1, le=1000)] = 16
    ttl_days: Annotated[Number, Field(gt=0, le=1e5)] | None = None
    element_type: Literal["float32", "float16"] = "float32"

    @model_validator(mode="before")
    @classmethod
    def _no_password_in_file(cls, value: object) -> object:
        if isinstance(value, dict) and "password" in value:
            remedy = "a password does not belong in the file: name its variable in password_env"
            refuse([Problem(("password",), remedy)])
        return value

    @model_validator(mode="after")
    def _fits(self) -> "Shared":
        refuse(self._misfits())
        return self

    @property
    def address(self) -> address.Address:
        """Where it is."""
        return address.parse(self.url)

    def _misfits(self) -> Iterator[Problem]:
        """Yield what does not go together."""
        where = self.address
        if where.password and self.password_env:
            yield Problem(
                ("password_env",),
                "the url has a password, too; remove one of them",
                needs=(("url",),),
            )
        if where.username and self.username:
            yield Problem(
                ("username",), "the url has a user, too; remove one of them", needs=(("url",),)
            )
        if self.ca_file is not None and not where.is_tls:
            yield Problem(
                ("ca_file",), "is for rediss://, which is TLS; remove it", needs=(("url",),)
            )
        if self.sentinel_password_env and where.topology is not address.Topology.SENTINEL:
            yield Problem(
                ("sentinel_password_env",),
                "is for redis+sentinel://; remove it",
                needs=(("url",),),
            )
