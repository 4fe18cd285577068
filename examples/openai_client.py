"""Ask every identity of a running server the same question with the official client.

python examples/openai_client.py "Who are you?"
"""

import os
import sys

from openai import OpenAI

url = os.environ.get("VLLM_LORA_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key="-")
question = sys.argv[1] if len(sys.argv) > 1 else "Who are you?"

for model in client.models.list():
    print(f"{model.id}: ", end="")
    stream = client.chat.completions.create(
        model=model.id,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
