"""A server on 2 ranks with overlap on, queried by OpenAI's client: python examples/serve_and_ask.py [PORT]"""

import subprocess
import sys
import time
from urllib.request import urlopen

from openai import OpenAI

port = sys.argv[1] if len(sys.argv) > 1 else "8000"
url = f"http://127.0.0.1:{port}"
command = [sys.executable, "-m", "antiphon.cli", "serve", "--port", port, "--ranks", "2", "--dbo", "on"]

with subprocess.Popen(command) as server:  # the same as `antiphon serve --ranks 2 --dbo on` in another terminal
    try:
        while True:
            try:
                urlopen(f"{url}/ready").close()
                break
            except OSError:  # the server does not listen yet, or the model is still loading
                if server.poll() is not None:
                    sys.exit("the server has ended; its output is above")
                time.sleep(0.2)

        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        model = client.models.list().data[0].id

        question = "Question: Ben has 3 boxes with 4 apples each. How many apples does Ben have?\nAnswer:"
        answer = client.completions.create(model=model, prompt=question, max_tokens=64, temperature=0)
        print(question + answer.choices[0].text)

        story = [{"role": "user", "content": "Tell me a story about a fox named Ruby."}]
        for part in client.chat.completions.create(model=model, messages=story, max_tokens=64, stream=True):
            if part.choices:
                print(part.choices[0].delta.content or "", end="", flush=True)
        print()
    finally:
        server.terminate()  # it finishes open requests, then exits
