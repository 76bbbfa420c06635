package bench

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/proto/databroker"
	"pgbroker/proto/session"
)

// Record types of the load.
const (
	sessionType        = "type.googleapis.com/session.Session"
	directoryUserType  = "pomerium.io/DirectoryUser"
	directoryGroupType = "pomerium.io/DirectoryGroup"
	structURL          = "type.googleapis.com/google.protobuf.Struct"
)

// A space is a sequence of record ids. They look like random UUIDs, so that they spread over an index as those of sessions
// do, and yet lead back to their place in the sequence.
type space struct {
	key  uint32
	tail string // of every id
}

const (
	idLength    = 36 // of a UUID
	digitsOfKey = 8
)

func newSpace(seed uint64, name string) space {
	sum := sha256.Sum256(fmt.Appendf(nil, "%d %s", seed, name))
	digits := hex.EncodeToString(sum[4:])
	return space{
		key:  binary.BigEndian.Uint32(sum[:4]),
		tail: fmt.Sprintf("-%s-4%s-8%s-%s", digits[:4], digits[4:7], digits[7:10], digits[10:22]),
	}
}

// id returns the id with an index.
func (s space) id(index uint32) string {
	b := make([]byte, 0, idLength)
	b = hex.AppendEncode(b, binary.BigEndian.AppendUint32(nil, scramble(index^s.key)))
	return string(append(b, s.tail...))
}

// index returns the index of an id; not ok for one that is not of this space.
func (s space) index(id []byte) (index uint32, ok bool) {
	if len(id) != idLength || string(id[digitsOfKey:]) != s.tail {
		return 0, false
	}
	var b [digitsOfKey / 2]byte
	if _, err := hex.Decode(b[:], id[:digitsOfKey]); err != nil {
		return 0, false
	}
	return unscramble(binary.BigEndian.Uint32(b[:])) ^ s.key, true
}

// scramble is a permutation of the 32-bit numbers that looks random (the last steps of MurmurHash3), and unscramble its
// inverse.
func scramble(x uint32) uint32 {
	x ^= x >> 16
	x *= 0x85ebca6b
	x ^= x >> 13
	x *= 0xc2b2ae35
	return x ^ x>>16
}

func unscramble(x uint32) uint32 {
	x ^= x >> 16
	x *= 0x7ed1b41d // inverse of 0xc2b2ae35 modulo 2^32
	x ^= x>>13 ^ x>>26
	x *= 0xa5cb9243 // inverse of 0x85ebca6b modulo 2^32
	return x ^ x>>16
}

// A corpus is what all records of a run are made of. The same seed makes the same records, but for times, which go by the
// hour of the run: a session that has expired would be deleted.
type corpus struct {
	seed      uint64
	templates []template
}

// A template is a serialized session. Records are copies of it with other ids and tokens, which costs the generator of the
// load next to nothing.
type template struct {
	value  []byte
	id     []int // where the session's id stands
	user   []int // where the user's id stands
	tokens []int // where each token has variable characters
	name   string
}

const (
	templateCount = 900 // fewer than there are pairs of names, so that each has its own
	// sessionsPerUser is how many sessions have the same user_id.
	sessionsPerUser = 3
	// variable is how many characters differ between the tokens of two records.
	variable = 24
)

func newCorpus(seed uint64, now time.Time) *corpus {
	c := &corpus{seed: seed, templates: make([]template, templateCount)}
	random := rand.New(rand.NewPCG(seed, 1))
	for i := range c.templates {
		c.templates[i] = newTemplate(random, i, now.Truncate(time.Hour))
	}
	return c
}

// newTemplate makes a session of about 1.4 kB as a sign-in with OpenID Connect leaves it.
func newTemplate(random *rand.Rand, i int, now time.Time) template {
	const (
		placeOfID   = "00000000-0000-4000-8000-000000000001"
		placeOfUser = "00000000-0000-4000-8000-000000000002"
	)
	placeOfToken := strings.Repeat("~", variable)
	given, family := givenNames[i%len(givenNames)], familyNames[i/len(givenNames)%len(familyNames)]
	name := given + " " + family
	email := strings.ToLower(given+"."+family) + "@corp.example"
	expires := timestamppb.New(now.Add(30 * 24 * time.Hour))
	issued := timestamppb.New(now.Add(-time.Duration(random.Int64N(int64(12 * time.Hour)))))
	groups := &structpb.ListValue{}
	for _, g := range random.Perm(len(groupNames))[:4] {
		groups.Values = append(groups.Values, structpb.NewStringValue(groupNames[g]))
	}
	one := func(value string) *structpb.ListValue {
		return &structpb.ListValue{Values: []*structpb.Value{structpb.NewStringValue(value)}}
	}
	message := &session.Session{
		Id: placeOfID, UserId: placeOfUser, ExpiresAt: expires, IssuedAt: issued, AccessedAt: timestamppb.New(now),
		IdToken: &session.IDToken{
			Issuer: "https://login.corp.example/oauth2/default", Subject: placeOfUser, ExpiresAt: expires, IssuedAt: issued,
			Raw: "eyJhbGciOiJSUzI1NiIsImtpZCI6Ijg3In0." + placeOfToken + randomText(random, 360),
		},
		OauthToken: &session.OAuthToken{
			AccessToken: "ya29." + placeOfToken + randomText(random, 130), TokenType: "Bearer", ExpiresAt: expires,
			RefreshToken: "1//0" + placeOfToken + randomText(random, 60),
		},
		Claims: map[string]*structpb.ListValue{
			"sub": one(placeOfUser), "email": one(email), "name": one(name), "given_name": one(given), "family_name": one(family),
			"groups": groups, "aud": one("pomerium-" + randomText(random, 16)), "iss": one("https://login.corp.example/oauth2/default"),
			"nonce": one(randomText(random, 22)),
		},
		Audience: []string{"wiki.corp.example", "grafana.corp.example", "authenticate.corp.example"},
		DeviceCredentials: []*session.Session_DeviceCredential{{
			TypeId: "any", Credential: &session.Session_DeviceCredential_Id{Id: randomText(random, 32)},
		}},
		IdpId: "idp-" + randomText(random, 22),
	}
	value, err := proto.MarshalOptions{Deterministic: true}.Marshal(message)
	if err != nil {
		panic(err) // it is made of valid text
	}
	return template{
		value: value, name: name,
		id: places(value, placeOfID), user: places(value, placeOfUser), tokens: places(value, placeOfToken),
	}
}

// randomText is text as tokens are made of: nothing that compresses.
func randomText(random *rand.Rand, length int) string {
	b := make([]byte, 0, length+8)
	for len(b) < length {
		b = binary.LittleEndian.AppendUint64(b, random.Uint64())
	}
	return base64.RawURLEncoding.EncodeToString(b)[:length]
}

// places returns every offset at which text stands in b.
func places(b []byte, text string) []int {
	var found []int
	for from := 0; ; {
		i := bytes.Index(b[from:], []byte(text))
		if i < 0 {
			return found
		}
		found = append(found, from+i)
		from += i + len(text)
	}
}

// A collection is a sequence of sessions of a corpus.
type collection struct {
	*corpus
	ids, users space
}

// collection returns the collection of a name: two of them have no id and no user in common.
func (c *corpus) collection(name string) *collection {
	return &collection{corpus: c, ids: newSpace(c.seed, name), users: newSpace(c.seed, name+" users")}
}

func (c *collection) template(index uint32) *template {
	return &c.templates[scramble(index+uint32(c.seed))%templateCount]
}

// userID returns the user of the session with an index.
func (c *collection) userID(index uint32) string { return c.users.id(index / sessionsPerUser) }

// value returns the serialized session with an index. Each revision has other tokens.
func (c *collection) value(index, revision uint32) []byte {
	t := c.template(index)
	value := bytes.Clone(t.value)
	id, user := c.ids.id(index), c.userID(index)
	for _, at := range t.id {
		copy(value[at:], id)
	}
	for _, at := range t.user {
		copy(value[at:], user)
	}
	var token [variable]byte
	hex.Encode(token[:16], binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, scramble(index^revision)), scramble(revision+1)))
	copy(token[16:], id)
	for _, at := range t.tokens {
		copy(value[at:], token[:])
	}
	return value
}

// record returns the session with an index, ready to be put.
func (c *collection) record(index, revision uint32) *databroker.Record {
	return &databroker.Record{
		Type: sessionType, Id: c.ids.id(index), Data: &anypb.Any{TypeUrl: sessionType, Value: c.value(index, revision)},
	}
}

// touch returns what a proxy patches when a session is used, with accessedMask.
func (c *collection) touch(index uint32, at time.Time) *databroker.Record {
	value, err := proto.Marshal(&session.Session{AccessedAt: timestamppb.New(at)})
	if err != nil {
		panic(err) // it is a valid message
	}
	return &databroker.Record{Type: sessionType, Id: c.ids.id(index), Data: &anypb.Any{TypeUrl: sessionType, Value: value}}
}

var accessedMask = &fieldmaskpb.FieldMask{Paths: []string{"accessed_at"}}

// deletion returns a record whose Put deletes the session with an index.
func (c *collection) deletion(index uint32) *databroker.Record {
	return deletion(&databroker.Record{Type: sessionType, Id: c.ids.id(index)})
}

func deletion(record *databroker.Record) *databroker.Record {
	return &databroker.Record{Type: record.GetType(), Id: record.GetId(), DeletedAt: timestamppb.Now()}
}

// A directory is what a company's identity provider knows, as a source of directory data writes it.
type directory struct {
	seed          uint64
	users, groups int
	userIDs       space
}

func newDirectory(seed uint64, users, groups int) *directory {
	return &directory{seed: seed, users: users, groups: groups, userIDs: newSpace(seed, "directory")}
}

// groupsPerUser is how many groups a user is in.
const groupsPerUser = 5

// size is the number of its records: groups first, then users.
func (d *directory) size() int { return d.groups + d.users }

// record returns the record with an index. Each revision of a user has another name.
func (d *directory) record(index, revision int) *databroker.Record {
	random := rand.New(rand.NewPCG(d.seed+uint64(revision), uint64(index)))
	if index < d.groups {
		id := d.groupID(index)
		name := fmt.Sprintf("%s %d", groupNames[index%len(groupNames)], index)
		return structRecord(directoryGroupType, id, map[string]any{
			"id": id, "name": name, "email": fmt.Sprintf("group-%d@corp.example", index),
		})
	}
	id := d.userIDs.id(uint32(index))
	given, family := givenNames[random.IntN(len(givenNames))], familyNames[random.IntN(len(familyNames))]
	ids := make([]any, 0, groupsPerUser)
	for range min(groupsPerUser, d.groups) {
		ids = append(ids, d.groupID(random.IntN(d.groups)))
	}
	return structRecord(directoryUserType, id, map[string]any{
		"id": id, "display_name": given + " " + family, "email": fmt.Sprintf("user-%d@corp.example", index), "group_ids": ids,
	})
}

func (d *directory) groupID(index int) string {
	return fmt.Sprintf("00g%017x", scramble(uint32(index)+1))
}

// records returns all records of a revision.
func (d *directory) records(revision int) []*databroker.Record {
	records := make([]*databroker.Record, d.size())
	for i := range records {
		records[i] = d.record(i, revision)
	}
	return records
}

func structRecord(recordType, id string, fields map[string]any) *databroker.Record {
	message, err := structpb.NewStruct(fields)
	if err != nil {
		panic(err) // it is made of texts and lists
	}
	value, err := proto.MarshalOptions{Deterministic: true}.Marshal(message)
	if err != nil {
		panic(err)
	}
	return &databroker.Record{Type: recordType, Id: id, Data: &anypb.Any{TypeUrl: structURL, Value: value}}
}

// batches cuts records into Puts.
func batches(records []*databroker.Record, size int) [][]*databroker.Record {
	return slices.Collect(slices.Chunk(records, size))
}

// What people and groups are called.
var (
	givenNames = []string{
		"Ada", "Alan", "Barbara", "Dennis", "Donald", "Edsger", "Frances", "Grace", "Hedy", "Jean", "John", "Katherine", "Ken", "Leslie",
		"Lynn", "Margaret", "Niklaus", "Radia", "Robin", "Shafi", "Sophie", "Tim", "Tony",
	}
	familyNames = []string{
		"Allen", "Bartik", "Cerf", "Dijkstra", "Easley", "Floyd", "Goldwasser", "Hamilton", "Hoare", "Hopper", "Iverson", "Johnson", "Kay",
		"Knuth", "Lamarr", "Lamport", "Liskov", "Lovelace", "McCarthy", "Milner", "Naur", "Perlman", "Postel", "Ritchie", "Rivest", "Sammet",
		"Shannon", "Shaw", "Sutherland", "Tarjan", "Thompson", "Torvalds", "Turing", "Ullman", "Valiant", "Wilkes", "Wilson", "Wing", "Wirth",
		"Yao", "Zadeh",
	}
	groupNames = []string{
		"Engineering", "Platform", "Site Reliability", "Security", "Finance", "People", "Legal", "Sales Europe", "Sales Americas", "Support",
		"Data Science", "Contractors", "VPN Users", "Administrators", "On-Call",
	}
)
