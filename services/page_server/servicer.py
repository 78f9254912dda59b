# SPDX-License-Identifier: Apache-2.0
"""ImageAdminService: the agent of this node says that the records have changed."""

from __future__ import annotations

import asyncio

import grpc.aio
from godwit.page.v1 import image_admin_service_pb2 as pb
from godwit.page.v1 import image_admin_service_pb2_grpc as pb_grpc

from services.common import grpc_server, hooks
from services.common.listen import Address
from services.page_server.images import ImageTable

NAME = pb.DESCRIPTOR.services_by_name["ImageAdminService"].full_name


class ImageAdminServicer(pb_grpc.ImageAdminServiceServicer):
    """Answers from the table of images."""

    def __init__(self, images: ImageTable, page_address: Address) -> None:
        self._images = images
        self._page_address = page_address

    async def ReloadImages(  # noqa: N802 - the method's name on the wire
        self,
        request: pb.ReloadImagesRequest,
        context: grpc_server.Context,  # noqa: ARG002
    ) -> pb.ReloadImagesResponse:
        """Serve exactly what the records say, and say what that is."""
        await hooks.reach("page_server.reload")
        if request.image_id:
            # One small file, while a guest stands still: a thread would take longer.
            reloaded = self._images.reload(request.image_id)
        else:
            reloaded = await asyncio.to_thread(self._images.reload)
        return pb.ReloadImagesResponse(
            images=[record.message() for record in reloaded.in_force],
            refused_images=[
                pb.RefusedImage(image_id=image_id, reason=reason)
                for image_id, reason in sorted(reloaded.refused.items())
            ],
            page_address=str(self._page_address),
        )

    def service(self) -> grpc_server.Service:
        """To be given to grpc_server.serving."""

        def add(server: grpc.aio.Server) -> None:
            pb_grpc.add_ImageAdminServiceServicer_to_server(self, server)

        return grpc_server.Service(name=NAME, add=add)
