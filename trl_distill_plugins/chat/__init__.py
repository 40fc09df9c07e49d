"""Chat formats: conversations to text and tokens and back, with a weight for every message.

The public names are resolved on first use.
"""

from typing import TYPE_CHECKING

from trl_distill_plugins.lazy import lazy_names

if TYPE_CHECKING:
    from trl_distill_plugins.chat.base import ChatFormat, get_chat_format
    from trl_distill_plugins.chat.custom import RoleTemplatesFormat
    from trl_distill_plugins.chat.detection import detect_chat_format
    from trl_distill_plugins.chat.installing import InstalledChatFormat, install_chat_format
    from trl_distill_plugins.chat.messages import Conversation, Message
    from trl_distill_plugins.chat.renderer import ChatRenderer, TokenizedConversation, get_renderer

__all__ = [
    "ChatFormat",
    "ChatRenderer",
    "Conversation",
    "InstalledChatFormat",
    "Message",
    "RoleTemplatesFormat",
    "TokenizedConversation",
    "detect_chat_format",
    "get_chat_format",
    "get_renderer",
    "install_chat_format",
]

_MODULE_OF = {
    "ChatFormat": "base",
    "ChatRenderer": "renderer",
    "Conversation": "messages",
    "InstalledChatFormat": "installing",
    "Message": "messages",
    "RoleTemplatesFormat": "custom",
    "TokenizedConversation": "renderer",
    "detect_chat_format": "detection",
    "get_chat_format": "base",
    "get_renderer": "renderer",
    "install_chat_format": "installing",
}


__getattr__ = lazy_names(__name__, _MODULE_OF)


def __dir__() -> list[str]:
    return list(__all__)
