package config

import (
	"encoding/json"
	"fmt"
	"os"
)

// ReadPluginFile reads a file such as plugins.d/NAME.toml and returns what the
// plugin is handed of it: all but the table belay, which is the agent's.
func ReadPluginFile(path string) (json.RawMessage, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the plugin's configuration: %w", err)
	}
	t := Table{}
	if err := decode(path, text, &t); err != nil {
		return nil, err
	}
	delete(t, "belay")
	b, err := json.Marshal(t)
	if err != nil { // infinity and NaN have no JSON
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return b, nil
}
