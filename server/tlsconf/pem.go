// Package tlsconf makes the TLS configurations of the server and of the command line's client.
//
// The server follows its certificate files: a renewed certificate is used for new connections about a second after it was
// written, without a restart and without touching the connections that exist. See package reload for how, and for why not
// with grpc's own certprovider/pemfile: that package writes the private key to its log when a certificate and a key do not
// match, insists on both being in one directory, and cannot say at the start that a file is unusable.
package tlsconf

import (
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"pgbroker/server/reload"
)

// PEM says where certificates or a private key in PEM form come from. The zero PEM is none. It can be formatted and logged
// without showing what it contains.
type PEM struct {
	file string
	data *string // a pointer to a string is never followed by package fmt
}

// File is PEM in a file, or the zero PEM if path is empty. The file is read later, by the function that gets the PEM.
func File(path string) PEM {
	if isPEM(path) {
		return PEM{file: misplaced} // to be refused without showing what may be a private key
	}
	return PEM{file: path}
}

// misplaced stands for the name of a file that is no name but what belongs into the file.
const misplaced = "(PEM where a file name is wanted)"

func isPEM(path string) bool {
	return strings.Contains(path, beginPEM) || strings.HasPrefix(path, base64.StdEncoding.EncodeToString([]byte(beginPEM))[:12])
}

// Memory is the PEM data itself, or the zero PEM if there is none.
func Memory(data []byte) PEM {
	if len(data) == 0 {
		return PEM{}
	}
	s := string(data)
	return PEM{data: &s}
}

// Base64 is PEM data in base64 with the standard alphabet and padding, the form of Pomerium's settings certificate,
// certificate_key and certificate_authority. Line breaks are allowed. It is the zero PEM if encoded is empty. The error does
// not show what was given.
func Base64(encoded string) (PEM, error) {
	data, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil {
		if strings.Contains(encoded, beginPEM) {
			return PEM{}, errors.New("got PEM, want it in base64 once more")
		}
		return PEM{}, errors.New("not base64, want PEM in base64 (standard alphabet, padded)")
	}
	if len(data) > 0 && !strings.Contains(string(data), beginPEM) {
		return PEM{}, errors.New("what the base64 contains is not PEM, want a block that begins with " + beginPEM)
	}
	return Memory(data), nil
}

const beginPEM = "-----BEGIN "

// IsZero reports whether there is neither a file nor data.
func (p PEM) IsZero() bool { return p == PEM{} }

// String returns the name of the file, "(in memory)" or "(none)".
func (p PEM) String() string {
	switch {
	case p.data != nil:
		return "(in memory)"
	case p.file == "":
		return "(none)"
	}
	return p.file
}

// LogValue implements [slog.LogValuer].
func (p PEM) LogValue() slog.Value { return slog.StringValue(p.String()) }

// load makes a value of the contents of PEMs that follows those which are files.
func load[T slog.LogValuer](name string, pems []PEM, parse func(contents [][]byte) (T, error), log *slog.Logger) (*reload.Value[T], error) {
	var paths []string
	for _, p := range pems {
		if p.file == misplaced {
			return nil, fmt.Errorf("%s: got PEM data where the name of a file is wanted", name)
		}
		if p.data == nil {
			paths = append(paths, p.file)
		}
	}
	return reload.New(name, paths, func(files [][]byte) (T, error) {
		contents := make([][]byte, len(pems))
		for i, p := range pems {
			if p.data != nil {
				contents[i] = []byte(*p.data)
			} else {
				contents[i], files = files[0], files[1:]
			}
		}
		return parse(contents)
	}, log)
}

// roots are certificates to trust.
type roots struct {
	pool  *x509.CertPool
	count int
}

// LogValue implements [slog.LogValuer].
func (r roots) LogValue() slog.Value { return slog.GroupValue(slog.Int("certificates", r.count)) }

func loadRoots(name string, p PEM, log *slog.Logger) (*reload.Value[roots], error) {
	return load(name+" "+p.String(), []PEM{p}, func(contents [][]byte) (roots, error) { return parseRoots(contents[0]) }, log)
}

// parseRoots is stricter than [x509.CertPool.AppendCertsFromPEM], which is content with one usable certificate among others.
func parseRoots(data []byte) (roots, error) {
	r := roots{pool: x509.NewCertPool()}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			return roots{}, fmt.Errorf("PEM block %d is a %s, want only CERTIFICATE", r.count+1, block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return roots{}, fmt.Errorf("certificate %d: %w", r.count+1, err)
		}
		r.pool.AddCert(cert)
		r.count++
	}
	if r.count == 0 {
		return roots{}, errors.New("no certificate in PEM form")
	}
	return r, nil
}
