package proto_test

import (
	"fmt"
	"iter"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"

	"pgbroker/proto/databroker"
	_ "pgbroker/proto/device"
	_ "pgbroker/proto/events"
	_ "pgbroker/proto/identity"
	_ "pgbroker/proto/oauth21"
	"pgbroker/proto/registry"
	"pgbroker/proto/rfc7591"
	_ "pgbroker/proto/session"
	_ "pgbroker/proto/user"
)

// The tables below are the wire contract, typed in from its description and not from
// the .proto files. The tests compare them with the compiled descriptors in both
// directions: what is missing on either side fails.

// wantFiles maps each contract file to its protobuf package and its Go package.
var wantFiles = map[string]string{
	"databroker/databroker.proto": "databroker pgbroker/proto/databroker",
	"device/device.proto":         "pomerium.device pgbroker/proto/device",
	"events/events.proto":         "pomerium.events pgbroker/proto/events",
	"identity/identity.proto":     "pomerium.identity pgbroker/proto/identity",
	"oauth21/oauth21.proto":       "oauth21 pgbroker/proto/oauth21",
	"registry/registry.proto":     "registry pgbroker/proto/registry",
	"rfc7591/rfc7591.proto":       "ietf.rfc7591.v1 pgbroker/proto/rfc7591",
	"session/session.proto":       "session pgbroker/proto/session",
	"user/user.proto":             "user pgbroker/proto/user",
}

// wantServices maps each service to its RPCs, sorted by name.
var wantServices = map[string][]string{
	"databroker.DataBrokerService": {
		"AcquireLease: databroker.AcquireLeaseRequest -> databroker.AcquireLeaseResponse",
		"Clear: google.protobuf.Empty -> databroker.ClearResponse",
		"Get: databroker.GetRequest -> databroker.GetResponse",
		"GetOptions: databroker.GetOptionsRequest -> databroker.GetOptionsResponse",
		"ListTypes: google.protobuf.Empty -> databroker.ListTypesResponse",
		"Patch: databroker.PatchRequest -> databroker.PatchResponse",
		"Put: databroker.PutRequest -> databroker.PutResponse",
		"Query: databroker.QueryRequest -> databroker.QueryResponse",
		"ReleaseLease: databroker.ReleaseLeaseRequest -> google.protobuf.Empty",
		"RenewLease: databroker.RenewLeaseRequest -> google.protobuf.Empty",
		"ServerInfo: google.protobuf.Empty -> databroker.ServerInfoResponse",
		"SetOptions: databroker.SetOptionsRequest -> databroker.SetOptionsResponse",
		"Sync: databroker.SyncRequest -> stream databroker.SyncResponse",
		"SyncLatest: databroker.SyncLatestRequest -> stream databroker.SyncLatestResponse",
	},
	"databroker.CheckpointService": {
		"GetCheckpoint: databroker.GetCheckpointRequest -> databroker.GetCheckpointResponse",
		"SetCheckpoint: databroker.SetCheckpointRequest -> databroker.SetCheckpointResponse",
	},
	"registry.Registry": {
		"List: registry.ListRequest -> registry.ServiceList",
		"Report: registry.RegisterRequest -> registry.RegisterResponse",
		"Watch: registry.ListRequest -> stream registry.ServiceList",
	},
}

// wantMessages maps each message to its fields, sorted by number:
//
//	number [optional|repeated] type name [in oneof]
var wantMessages = map[string][]string{
	"databroker.Record": {
		"1 uint64 version",
		"2 string type",
		"3 string id",
		"4 google.protobuf.Any data",
		"5 google.protobuf.Timestamp modified_at",
		"6 google.protobuf.Timestamp deleted_at",
	},
	"databroker.Versions": {
		"1 uint64 server_version",
		"2 uint64 latest_record_version",
	},
	"databroker.Options": {
		"1 optional uint64 capacity",
		"2 repeated string indexable_fields",
		"3 optional google.protobuf.Duration ttl",
	},
	"databroker.TypedOptions": {
		"1 string typeURL",
		"2 databroker.Options options",
	},
	"databroker.ClearResponse": {
		"1 uint64 old_server_version",
		"2 uint64 new_server_version",
	},
	"databroker.GetRequest": {
		"1 string type",
		"2 string id",
	},
	"databroker.GetResponse": {
		"1 databroker.Record record",
	},
	"databroker.ListTypesResponse": {
		"1 repeated string types",
	},
	"databroker.QueryRequest": {
		"1 string type",
		"2 string query",
		"3 int64 offset",
		"4 int64 limit",
		"5 google.protobuf.Struct filter",
		"6 optional uint64 minimum_record_version_hint",
	},
	"databroker.QueryResponse": {
		"1 repeated databroker.Record records",
		"2 int64 total_count",
		"3 uint64 server_version",
		"4 uint64 record_version",
	},
	"databroker.PutRequest": {
		"1 repeated databroker.Record records",
	},
	"databroker.PutResponse": {
		"1 uint64 server_version",
		"2 repeated databroker.Record records",
	},
	"databroker.PatchRequest": {
		"1 repeated databroker.Record records",
		"2 google.protobuf.FieldMask field_mask",
	},
	"databroker.PatchResponse": {
		"1 uint64 server_version",
		"2 repeated databroker.Record records",
	},
	"databroker.ServerInfoResponse": {
		"1 uint64 server_version",
		"2 uint64 earliest_record_version",
		"3 uint64 latest_record_version",
	},
	"databroker.GetOptionsRequest": {
		"1 string type",
	},
	"databroker.GetOptionsResponse": {
		"1 databroker.Options options",
	},
	"databroker.SetOptionsRequest": {
		"1 string type",
		"2 databroker.Options options",
	},
	"databroker.SetOptionsResponse": {
		"1 databroker.Options options",
	},
	"databroker.SyncRequest": {
		"1 uint64 server_version",
		"2 uint64 record_version",
		"3 string type",
		"4 optional bool wait",
	},
	"databroker.SyncResponse": {
		"1 databroker.Record record in response",
		"2 databroker.TypedOptions options in response",
	},
	"databroker.SyncLatestRequest": {
		"1 string type",
	},
	"databroker.SyncLatestResponse": {
		"1 databroker.Record record in response",
		"2 databroker.Versions versions in response",
		"3 databroker.TypedOptions options in response",
	},
	"databroker.AcquireLeaseRequest": {
		"1 string name",
		"2 google.protobuf.Duration duration",
	},
	"databroker.AcquireLeaseResponse": {
		"1 string id",
	},
	"databroker.ReleaseLeaseRequest": {
		"1 string name",
		"2 string id",
	},
	"databroker.RenewLeaseRequest": {
		"1 string name",
		"2 string id",
		"3 google.protobuf.Duration duration",
	},
	"databroker.Checkpoint": {
		"1 uint64 server_version",
		"2 uint64 record_version",
	},
	"databroker.GetCheckpointRequest": {},
	"databroker.GetCheckpointResponse": {
		"1 databroker.Checkpoint checkpoint",
		"2 bool is_leader",
	},
	"databroker.SetCheckpointRequest": {
		"1 databroker.Checkpoint checkpoint",
	},
	"databroker.SetCheckpointResponse": {},

	"registry.Service": {
		"1 enum registry.ServiceKind kind",
		"3 string endpoint",
	},
	"registry.RegisterRequest": {
		"1 repeated registry.Service services",
		"2 map<string, google.protobuf.Any> metadata",
	},
	"registry.RegisterResponse": {
		"2 google.protobuf.Duration call_back_after",
	},
	"registry.ListRequest": {
		"1 repeated enum registry.ServiceKind kinds",
	},
	"registry.ServiceRegistration": {
		"1 registry.Service service",
		"2 google.protobuf.Timestamp expires_at",
	},
	"registry.ServiceList": {
		"1 repeated registry.Service services",
	},

	"session.Session": {
		"1 string version",
		"2 string id",
		"3 string user_id",
		"4 google.protobuf.Timestamp expires_at",
		"6 session.IDToken id_token",
		"7 session.OAuthToken oauth_token",
		"9 map<string, google.protobuf.ListValue> claims",
		"10 repeated string audience",
		"14 google.protobuf.Timestamp issued_at",
		"15 optional string impersonate_session_id",
		"17 repeated session.Session.DeviceCredential device_credentials",
		"18 google.protobuf.Timestamp accessed_at",
		"19 bool refresh_disabled",
		"20 string idp_id",
	},
	"session.Session.DeviceCredential": {
		"1 string type_id",
		"2 google.protobuf.Empty unavailable in credential",
		"3 string id in credential",
	},
	"session.IDToken": {
		"1 string issuer",
		"2 string subject",
		"3 google.protobuf.Timestamp expires_at",
		"4 google.protobuf.Timestamp issued_at",
		"5 string raw",
	},
	"session.OAuthToken": {
		"1 string access_token",
		"2 string token_type",
		"3 google.protobuf.Timestamp expires_at",
		"4 string refresh_token",
	},
	"session.SessionBindingRequest": {
		"1 string protocol",
		"2 string idp_id",
		"3 string key",
		"4 google.protobuf.Timestamp created_at",
		"5 google.protobuf.Timestamp expires_at",
		"6 enum session.SessionBindingRequestState state",
		"7 map<string, string> details",
	},
	"session.SessionBinding": {
		"1 string protocol",
		"2 string session_id",
		"3 string user_id",
		"4 google.protobuf.Timestamp issued_at",
		"5 google.protobuf.Timestamp expires_at",
		"6 map<string, string> details",
	},
	"session.IdentityBinding": {
		"1 string protocol",
		"2 string user_id",
		"3 string idp_id",
		"4 map<string, string> details",
	},
	"session.Handle": {
		"1 string id",
		"2 string user_id",
		"3 string identity_provider_id",
		"4 optional uint64 databroker_server_version",
		"5 optional uint64 databroker_record_version",
		"6 optional string iss",
		"7 repeated string aud",
		"8 optional google.protobuf.Timestamp exp",
		"9 optional google.protobuf.Timestamp nbf",
		"10 optional google.protobuf.Timestamp iat",
	},

	"user.User": {
		"1 string version",
		"2 string id",
		"3 string name",
		"4 string email",
		"9 map<string, google.protobuf.ListValue> claims",
		"10 repeated string device_credential_ids",
	},
	"user.ServiceAccount": {
		"1 string id",
		"2 string user_id",
		"3 google.protobuf.Timestamp expires_at",
		"4 google.protobuf.Timestamp issued_at",
		"8 optional string namespace_id",
		"9 optional string description",
		"10 google.protobuf.Timestamp accessed_at",
		"11 optional string originator_id",
	},
	"user.Claim": {
		"1 string key",
		"2 repeated string values",
	},

	"pomerium.device.Type": {
		"1 string id",
		"2 string name",
		"3 pomerium.device.Type.WebAuthn webauthn in specifier",
	},
	"pomerium.device.Type.WebAuthn": {
		"1 pomerium.device.WebAuthnOptions options",
	},
	"pomerium.device.Enrollment": {
		"1 string id",
		"2 string user_id",
		"3 string approved_by",
		"4 google.protobuf.Timestamp enrolled_at",
		"5 string user_agent",
		"6 string ip_address",
		"7 string type_id",
		"8 string credential_id",
	},
	"pomerium.device.Credential": {
		"1 string id",
		"2 string type_id",
		"3 string enrollment_id",
		"4 string user_id",
		"5 pomerium.device.Credential.WebAuthn webauthn in specifier",
	},
	"pomerium.device.Credential.WebAuthn": {
		"1 bytes id",
		"2 bytes public_key",
		"3 bytes register_options",
		"4 bytes register_response",
		"5 repeated bytes authenticate_response",
	},
	"pomerium.device.OwnerCredentialRecord": {
		"1 bytes id",
		"2 bytes owner_id",
		"3 bytes public_key",
	},
	"pomerium.device.WebAuthnOptions": {
		"1 optional enum pomerium.device.WebAuthnOptions.AttestationConveyancePreference attestation",
		"2 optional pomerium.device.WebAuthnOptions.AuthenticatorSelectionCriteria authenticator_selection",
		"3 repeated pomerium.device.WebAuthnOptions.PublicKeyCredentialParameters pub_key_cred_params",
	},
	"pomerium.device.WebAuthnOptions.AuthenticatorSelectionCriteria": {
		"1 optional enum pomerium.device.WebAuthnOptions.AuthenticatorAttachment authenticator_attachment",
		"2 optional bool require_resident_key",
		"3 optional enum pomerium.device.WebAuthnOptions.ResidentKeyRequirement resident_key_requirement",
		"4 optional enum pomerium.device.WebAuthnOptions.UserVerificationRequirement user_verification",
	},
	"pomerium.device.WebAuthnOptions.PublicKeyCredentialParameters": {
		"1 int64 alg",
		"2 enum pomerium.device.WebAuthnOptions.PublicKeyCredentialType type",
	},

	"pomerium.identity.Provider": {
		"1 string id",
		"2 string client_id",
		"3 string client_secret",
		"4 string type",
		"5 repeated string scopes",
		"7 string url",
		"8 map<string, string> request_params",
		"9 string authenticate_service_url",
		"10 optional pomerium.identity.Provider.StringList access_token_allowed_audiences",
		"11 int64 version",
		"reserved 6",
	},
	"pomerium.identity.Provider.StringList": {
		"1 repeated string values",
	},
	"pomerium.identity.Profile": {
		"1 string provider_id",
		"2 bytes id_token",
		"3 bytes oauth_token",
		"4 google.protobuf.Struct claims",
	},

	"oauth21.AuthorizationRequest": {
		"1 string client_id",
		"2 optional string redirect_uri",
		"3 string response_type",
		"4 optional string state",
		"5 repeated string scopes",
		"6 optional string code_challenge",
		"7 optional string code_challenge_method",
		"8 string session_id",
		"9 string user_id",
	},
	"oauth21.MCPRefreshToken": {
		"1 string id",
		"2 string user_id",
		"3 string client_id",
		"4 string idp_id",
		"5 string upstream_refresh_token",
		"6 google.protobuf.Timestamp issued_at",
		"7 google.protobuf.Timestamp expires_at",
		"8 repeated string scopes",
		"9 bool revoked",
	},
	"oauth21.UpstreamMCPToken": {
		"1 string user_id",
		"2 string route_id",
		"3 string upstream_server",
		"4 string access_token",
		"5 string refresh_token",
		"6 string token_type",
		"7 google.protobuf.Timestamp issued_at",
		"8 google.protobuf.Timestamp expires_at",
		"9 google.protobuf.Timestamp refresh_expires_at",
		"10 repeated string scopes",
		"11 string client_id",
		"12 string authorization_server_issuer",
		"13 string token_endpoint",
		"14 string resource_param",
		"15 string client_secret",
	},
	"oauth21.PendingUpstreamAuth": {
		"1 string state_id",
		"2 string user_id",
		"3 string route_id",
		"4 string upstream_server",
		"5 string pkce_verifier",
		"6 repeated string scopes",
		"7 string authorization_endpoint",
		"8 string token_endpoint",
		"9 string authorization_server_issuer",
		"10 string original_url",
		"11 string redirect_uri",
		"12 string client_id",
		"13 google.protobuf.Timestamp created_at",
		"14 google.protobuf.Timestamp expires_at",
		"15 string downstream_host",
		"16 string auth_req_id",
		"17 string pkce_challenge",
		"18 string client_secret",
		"19 string resource_param",
		"20 bool must_validate_issuer",
	},
	"oauth21.UpstreamOAuthClient": {
		"1 string issuer",
		"2 string downstream_host",
		"3 string client_id",
		"4 string client_secret",
		"5 string redirect_uri",
		"6 string registration_endpoint",
		"7 google.protobuf.Timestamp created_at",
	},
	"oauth21.Code": {
		"1 string id",
		"2 google.protobuf.Timestamp expires_at",
		"3 enum oauth21.CodeType grant_type",
		"4 uint64 record_version",
	},
	"oauth21.TokenRequest": {
		"1 string grant_type",
		"2 optional string code",
		"3 optional string code_verifier",
		"4 optional string client_id",
		"5 optional string refresh_token",
		"6 optional string scope",
		"7 optional string client_secret",
	},
	"oauth21.TokenResponse": {
		"1 string access_token",
		"2 string token_type",
		"3 optional int64 expires_in",
		"4 optional string refresh_token",
		"5 optional string scope",
		"6 optional google.protobuf.Timestamp expires_at",
	},

	"ietf.rfc7591.v1.Metadata": {},
	"ietf.rfc7591.v1.ClientSecret": {
		"1 string value",
		"2 optional google.protobuf.Timestamp expires_at",
		"3 google.protobuf.Timestamp created_at",
	},
	"ietf.rfc7591.v1.ClientRegistration": {
		"1 ietf.rfc7591.v1.Metadata request_metadata",
		"2 ietf.rfc7591.v1.Metadata response_metadata",
		"3 ietf.rfc7591.v1.ClientSecret client_secret",
	},

	"pomerium.events.LastError": {
		"1 google.protobuf.Timestamp time",
		"2 string message",
		"3 string id",
	},
}

// wantEnums maps each enum to its values, in declaration order.
var wantEnums = map[string][]string{
	"registry.ServiceKind": {
		"0 UNDEFINED_DO_NOT_USE",
		"1 DATABROKER",
		"2 AUTHORIZE",
		"3 AUTHENTICATE",
		"4 PROXY",
		"5 REGISTRY",
		"6 CONSOLE",
		"7 PROMETHEUS_METRICS",
	},
	"session.SessionBindingRequestState": {
		"0 InFlight",
		"1 Accepted",
		"2 Revoked",
	},
	"pomerium.device.WebAuthnOptions.AttestationConveyancePreference": {
		"0 NONE",
		"1 INDIRECT",
		"2 DIRECT",
		"3 ENTERPRISE",
	},
	"pomerium.device.WebAuthnOptions.AuthenticatorAttachment": {
		"0 PLATFORM",
		"2 CROSS_PLATFORM",
	},
	"pomerium.device.WebAuthnOptions.PublicKeyCredentialType": {
		"0 PUBLIC_KEY",
	},
	"pomerium.device.WebAuthnOptions.ResidentKeyRequirement": {
		"0 RESIDENT_KEY_DISCOURAGED",
		"1 RESIDENT_KEY_PREFERRED",
		"2 RESIDENT_KEY_REQUIRED",
	},
	"pomerium.device.WebAuthnOptions.UserVerificationRequirement": {
		"0 USER_VERIFICATION_DISCOURAGED",
		"1 USER_VERIFICATION_PREFERRED",
		"2 USER_VERIFICATION_REQUIRED",
	},
	"oauth21.CodeType": {
		"0 CODE_TYPE_UNSPECIFIED",
		"1 CODE_TYPE_AUTHORIZATION",
		"2 CODE_TYPE_ACCESS",
		"3 CODE_TYPE_REFRESH",
	},
}

// wantSecrets lists the fields that no projection shows, sorted.
var wantSecrets = []string{
	"ietf.rfc7591.v1.ClientSecret.value",
	"oauth21.AuthorizationRequest.state",
	"oauth21.MCPRefreshToken.upstream_refresh_token",
	"oauth21.PendingUpstreamAuth.client_secret",
	"oauth21.PendingUpstreamAuth.pkce_verifier",
	"oauth21.TokenRequest.client_secret",
	"oauth21.TokenRequest.code",
	"oauth21.TokenRequest.code_verifier",
	"oauth21.TokenRequest.refresh_token",
	"oauth21.TokenResponse.access_token",
	"oauth21.TokenResponse.refresh_token",
	"oauth21.UpstreamMCPToken.access_token",
	"oauth21.UpstreamMCPToken.client_secret",
	"oauth21.UpstreamMCPToken.refresh_token",
	"oauth21.UpstreamOAuthClient.client_secret",
	"pomerium.device.Credential.WebAuthn.authenticate_response",
	"pomerium.device.Credential.WebAuthn.register_options",
	"pomerium.device.Credential.WebAuthn.register_response",
	"pomerium.identity.Profile.id_token",
	"pomerium.identity.Profile.oauth_token",
	"pomerium.identity.Provider.client_secret",
	"session.IDToken.raw",
	"session.OAuthToken.access_token",
	"session.OAuthToken.refresh_token",
}

func TestFiles(t *testing.T) {
	got := map[string]string{}
	for _, f := range files(t) {
		if f.Syntax() != protoreflect.Proto3 {
			t.Errorf("%s has syntax %s, want proto3", f.Path(), f.Syntax())
		}
		if n := f.Extensions().Len(); n > 0 {
			t.Errorf("%s declares %d extensions", f.Path(), n)
		}
		goPackage := f.Options().(*descriptorpb.FileOptions).GetGoPackage()
		got[f.Path()] = string(f.Package()) + " " + goPackage
	}
	equal(t, wantFiles, got)
}

func TestServices(t *testing.T) {
	got := map[string][]string{}
	for _, f := range files(t) {
		for s := range each(f.Services()) {
			rpcs := []string{}
			for m := range each(s.Methods()) {
				rpcs = append(rpcs, renderMethod(m))
			}
			slices.Sort(rpcs)
			got[string(s.FullName())] = rpcs
		}
	}
	equal(t, wantServices, got)
}

// TestServiceDescs checks what the gRPC server registers, which a generator of its
// own writes.
func TestServiceDescs(t *testing.T) {
	got := map[string][]string{}
	for _, d := range []grpc.ServiceDesc{
		databroker.DataBrokerService_ServiceDesc,
		databroker.CheckpointService_ServiceDesc,
		registry.Registry_ServiceDesc,
	} {
		s, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(d.ServiceName))
		if err != nil {
			t.Fatal(err)
		}
		methods := s.(protoreflect.ServiceDescriptor).Methods()
		rpcs := []string{}
		for _, m := range d.Methods {
			md := methods.ByName(protoreflect.Name(m.MethodName))
			if md == nil || md.IsStreamingServer() || md.IsStreamingClient() {
				t.Errorf("%s/%s is registered as unary", d.ServiceName, m.MethodName)
				continue
			}
			rpcs = append(rpcs, renderMethod(md))
		}
		for _, m := range d.Streams {
			md := methods.ByName(protoreflect.Name(m.StreamName))
			if md == nil || md.IsStreamingServer() != m.ServerStreams || md.IsStreamingClient() != m.ClientStreams {
				t.Errorf("%s/%s is registered as stream", d.ServiceName, m.StreamName)
				continue
			}
			rpcs = append(rpcs, renderMethod(md))
		}
		slices.Sort(rpcs)
		got[d.ServiceName] = rpcs
	}
	equal(t, wantServices, got)
}

func TestMessages(t *testing.T) {
	got := map[string][]string{}
	for m := range messages(t) {
		fields := make([]protoreflect.FieldDescriptor, 0, m.Fields().Len())
		for f := range each(m.Fields()) {
			fields = append(fields, f)
		}
		slices.SortFunc(fields, func(a, b protoreflect.FieldDescriptor) int {
			return int(a.Number()) - int(b.Number())
		})
		lines := []string{}
		for _, f := range fields {
			lines = append(lines, renderField(f))
		}
		for i := range m.ReservedRanges().Len() {
			r := m.ReservedRanges().Get(i) // half open
			for n := r[0]; n < r[1]; n++ {
				lines = append(lines, fmt.Sprintf("reserved %d", n))
			}
		}
		for i := range m.ReservedNames().Len() {
			lines = append(lines, fmt.Sprintf("reserved %q", m.ReservedNames().Get(i)))
		}
		got[string(m.FullName())] = lines
	}
	equal(t, wantMessages, got)
}

func TestEnums(t *testing.T) {
	got := map[string][]string{}
	add := func(enums protoreflect.EnumDescriptors) {
		for e := range each(enums) {
			values := []string{}
			for v := range each(e.Values()) {
				values = append(values, fmt.Sprintf("%d %s", v.Number(), v.Name()))
			}
			got[string(e.FullName())] = values
		}
	}
	for _, f := range files(t) {
		add(f.Enums())
	}
	for m := range messages(t) {
		add(m.Enums())
	}
	equal(t, wantEnums, got)
}

func TestSecrets(t *testing.T) {
	var got []string
	for m := range messages(t) {
		for f := range each(m.Fields()) {
			if f.Options().(*descriptorpb.FieldOptions).GetDebugRedact() {
				got = append(got, string(f.FullName()))
			}
		}
	}
	slices.Sort(got)
	equal(t, wantSecrets, got)
}

// TestOpaqueMetadata checks that client metadata, of which no field is declared,
// comes out as it went in, and does not show where a message is made readable.
func TestOpaqueMetadata(t *testing.T) {
	metadata := protowire.AppendTag(nil, 4, protowire.BytesType)
	metadata = protowire.AppendString(metadata, "confidential")
	metadata = protowire.AppendTag(metadata, 200, protowire.VarintType)
	metadata = protowire.AppendVarint(metadata, 7)
	want := protowire.AppendTag(nil, 1, protowire.BytesType)
	want = protowire.AppendBytes(want, metadata)
	want = protowire.AppendTag(want, 2, protowire.BytesType)
	want = protowire.AppendBytes(want, metadata)

	var registration rfc7591.ClientRegistration
	if err := proto.Unmarshal(want, &registration); err != nil {
		t.Fatal(err)
	}
	got, err := proto.MarshalOptions{Deterministic: true}.Marshal(&registration)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, want, got)

	shown, err := protojson.Marshal(registration.GetResponseMetadata())
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "{}", string(shown))
}

func equal[T any](t *testing.T, want, got T) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("differs from the contract (-want +got):\n%s", diff)
	}
}

// files returns the descriptors of all contract files in the folder.
func files(t *testing.T) []protoreflect.FileDescriptor {
	t.Helper()
	paths, err := filepath.Glob("*/*.proto")
	if err != nil {
		t.Fatal(err)
	}
	descriptors := make([]protoreflect.FileDescriptor, 0, len(paths))
	for _, path := range paths {
		f, err := protoregistry.GlobalFiles.FindFileByPath(filepath.ToSlash(path))
		if err != nil {
			t.Fatalf("no generated Go for %s is linked into this test: %v", path, err)
		}
		descriptors = append(descriptors, f)
	}
	return descriptors
}

// messages yields all messages of all files, nested ones included, without the
// entries of maps.
func messages(t *testing.T) iter.Seq[protoreflect.MessageDescriptor] {
	t.Helper()
	var walk func(protoreflect.MessageDescriptors, func(protoreflect.MessageDescriptor) bool) bool
	walk = func(list protoreflect.MessageDescriptors, yield func(protoreflect.MessageDescriptor) bool) bool {
		for m := range each(list) {
			if m.IsMapEntry() {
				continue
			}
			if !yield(m) || !walk(m.Messages(), yield) {
				return false
			}
		}
		return true
	}
	descriptors := files(t)
	return func(yield func(protoreflect.MessageDescriptor) bool) {
		for _, f := range descriptors {
			if !walk(f.Messages(), yield) {
				return
			}
		}
	}
}

// each yields the elements of a list of descriptors.
func each[D any](list interface {
	Len() int
	Get(i int) D
}) iter.Seq[D] {
	return func(yield func(D) bool) {
		for i := range list.Len() {
			if !yield(list.Get(i)) {
				return
			}
		}
	}
}

func renderMethod(m protoreflect.MethodDescriptor) string {
	in, out := string(m.Input().FullName()), string(m.Output().FullName())
	if m.IsStreamingClient() {
		in = "stream " + in
	}
	if m.IsStreamingServer() {
		out = "stream " + out
	}
	return fmt.Sprintf("%s: %s -> %s", m.Name(), in, out)
}

func renderField(f protoreflect.FieldDescriptor) string {
	var label, oneof string
	switch {
	case f.IsMap():
		return fmt.Sprintf("%d map<%s, %s> %s", f.Number(), renderType(f.MapKey()), renderType(f.MapValue()), f.Name())
	case f.HasOptionalKeyword():
		label = "optional "
	case f.IsList():
		label = "repeated "
	}
	if o := f.ContainingOneof(); o != nil && !o.IsSynthetic() {
		oneof = " in " + string(o.Name())
	}
	return fmt.Sprintf("%d %s%s %s%s", f.Number(), label, renderType(f), f.Name(), oneof)
}

func renderType(f protoreflect.FieldDescriptor) string {
	switch f.Kind() {
	case protoreflect.MessageKind:
		return string(f.Message().FullName())
	case protoreflect.EnumKind:
		return "enum " + string(f.Enum().FullName())
	default:
		return f.Kind().String()
	}
}
