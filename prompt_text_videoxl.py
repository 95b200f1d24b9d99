"""The wording of prompts: the chat template, and what is said behind a video.

What is surprising:
* A history of the published VideoChat-Flash code brings what it said about its video in the text of its first turn.
  That is replayed as it stands, and nothing is said twice.
"""

import re
from string import Formatter

# chat_template.jinja holds the same text, for the tokenizer.
DEFAULT_CHAT_TEMPLATE = r"""{%- if not messages or messages[0].role != 'system' -%}
{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' -}}
{%- for item in (({'type': 'text', 'text': message.content},) if message.content is string else message.content) -%}
{%- if item.type == 'video' -%}
{{- video_token | default('<|vision_pad|>', true) + '\n' -}}
{%- elif item.type == 'image' -%}
{{- image_token | default('<|image_pad|>', true) + '\n' -}}
{%- elif item.type == 'text' -%}
{{- item.text -}}
{%- else -%}
{{- raise_exception('Content items are of type text, image or video, not ' + item.type | string) -}}
{%- endif -%}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""


def with_video_message(text: str, message: str, duration: float, num_frames: int) -> str:
    """The text behind a video's marker, with what is said about the video in front of all but a newline.

    Args:
        text: As rendered. If it already says such a thing it stays as it is.
        message: What to say, formatted with `duration` in seconds and `num_frames`.
        duration, num_frames: Of the video.
    """
    newline = "\n" if text.startswith("\n") else ""
    rest = text.removeprefix("\n")
    fields = Formatter().parse(message)
    if re.match("".join(re.escape(literal) + (".+?" if name else "") for literal, name, _, _ in fields), rest):
        return text
    return f"{newline}{message.format(duration=float(duration), num_frames=num_frames)}{rest}"
