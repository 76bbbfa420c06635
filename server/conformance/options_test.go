package conformance_test

import (
	"testing"

	"pgbroker/proto/databroker"
)

func setOptions(t *testing.T, c client, recordType string, options *databroker.Options) *databroker.Options {
	t.Helper()
	response, err := c.SetOptions(testContext(t), &databroker.SetOptionsRequest{Type: recordType, Options: options})
	if err != nil {
		t.Fatalf("set options of %s: %v", recordType, err)
	}
	return response.Options
}
