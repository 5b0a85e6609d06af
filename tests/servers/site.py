"""A site of three pages: an answer at once, and a story as it comes, sync and async."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import path

import ai_budget


async def answer(request: HttpRequest) -> HttpResponse:
    return HttpResponse((await ai_budget.aask("Hello", feature="answers")).text)


def tell(request: HttpRequest) -> StreamingHttpResponse:
    def body() -> Iterator[str]:
        with ai_budget.stream("A story", feature="tales", max_tokens=4_000) as story:
            yield from story

    return StreamingHttpResponse(body())


async def atell(request: HttpRequest) -> StreamingHttpResponse:
    async def body() -> AsyncIterator[str]:
        async with ai_budget.astream("A story", feature="tales", max_tokens=4_000) as story:
            async for piece in story:
                yield piece

    return StreamingHttpResponse(body())


urlpatterns = [
    path("answer/", answer),
    path("tell/", tell),
    path("atell/", atell),
]
