// Execute a template by Go's text/template with the variables that Ollama passes.
//
// In: {"template": TEXT, "conversations": [[{"Role": ..., "Content": ...}, ...], ...]}; out: a JSON list of texts.
// As Ollama documents, .System holds all system prompts, and adjacent messages of one role are one message.
package main

import (
	"encoding/json"
	"log"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role      string
	Content   string
	ToolCalls []any
}

func join(messages []message) (string, []*message) {
	var system []string
	var joined []*message
	for i := range messages {
		current := messages[i]
		if current.Role == "system" {
			system = append(system, current.Content)
		}
		if last := len(joined) - 1; last >= 0 && joined[last].Role == current.Role && current.Role != "tool" {
			joined[last].Content += "\n\n" + current.Content
		} else {
			joined = append(joined, &current)
		}
	}
	return strings.Join(system, "\n\n"), joined
}

func main() {
	var input struct {
		Template      string      `json:"template"`
		Conversations [][]message `json:"conversations"`
	}
	if err := json.NewDecoder(os.Stdin).Decode(&input); err != nil {
		log.Fatal(err)
	}
	parsed, err := template.New("").Option("missingkey=zero").Parse(input.Template)
	if err != nil {
		log.Fatal(err)
	}
	texts := make([]string, 0, len(input.Conversations))
	for _, conversation := range input.Conversations {
		system, messages := join(conversation)
		var text strings.Builder
		values := map[string]any{"System": system, "Messages": messages, "Tools": nil, "Response": ""}
		if err := parsed.Execute(&text, values); err != nil {
			log.Fatal(err)
		}
		texts = append(texts, text.String())
	}
	if err := json.NewEncoder(os.Stdout).Encode(texts); err != nil {
		log.Fatal(err)
	}
}
