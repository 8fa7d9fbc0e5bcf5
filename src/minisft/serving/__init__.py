"""An OpenAI-compatible server and a chat page for a run's models.

Read in this order:

- server: the application, its routes, and the start and stop of the process
- guards: which hosts, origins, keys and bodies are refused
- protocol: JSON bodies to checked requests, and errors in OpenAI's form
- model_pool: the models by name, loaded when they are first asked
- scheduler: the one thread that decodes, and what it delivers
- answer_text: from token ids to pieces of text, with stop texts, reasoning and tool calls
- reply_bodies: pieces of text to response bodies and stream chunks
- chat_page: the chat page as one HTML document, from chat.html.j2, chat.css and chat.js
- preferences: the thumbs of the chat page, appended to the run's preferences.jsonl
"""
