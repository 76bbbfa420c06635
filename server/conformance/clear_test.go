package conformance_test

import (
	"testing"

	"google.golang.org/protobuf/types/known/emptypb"

	"pgbroker/proto/databroker"
)

func clear(t *testing.T, c client) *databroker.ClearResponse {
	t.Helper()
	response, err := c.Clear(testContext(t), new(emptypb.Empty))
	if err != nil {
		t.Fatalf("clear: %v", err)
	}
	return response
}
