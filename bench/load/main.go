// Load for an S3 endpoint, with nothing but Go's standard library: PUT and GET of one size by several clients.
//
//	load -e HOST:PORT -a KEY -s SECRET -op put|get -size BYTES -c CLIENTS -d DURATION
//
// prints one JSON line: operations, errors, per_s, p50_ms, p99_ms. Requests carry Signature Version 4 with the SHA-256 of the
// payload, computed once, so that the client costs as little as it can; the server verifies it for every request.
package main

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"sort"
	"sync"
	"time"
)

var (
	endpoint = flag.String("e", "127.0.0.1:9000", "host:port")
	access   = flag.String("a", "", "access key")
	secret   = flag.String("s", "", "secret key")
	bucket   = flag.String("b", "load", "bucket, made if it is not there")
	op       = flag.String("op", "put", "put or get; get reads what the same command put before")
	size     = flag.Int("size", 65536, "bytes of an object")
	clients  = flag.Int("c", 8, "clients")
	duration = flag.Duration("d", 5*time.Second, "how long")
	keys     = flag.Int("keys", 512, "distinct keys a client")
)

func mac(key []byte, text string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(text))
	return h.Sum(nil)
}

func hexHash(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// send signs and sends one request and returns its status.
func send(client *http.Client, method, path string, body []byte, bodyHash string) (int, error) {
	now := time.Now().UTC()
	stamp, day := now.Format("20060102T150405Z"), now.Format("20060102")
	signed := "host;x-amz-content-sha256;x-amz-date"
	canonical := fmt.Sprintf("%s\n%s\n\nhost:%s\nx-amz-content-sha256:%s\nx-amz-date:%s\n\n%s\n%s",
		method, path, *endpoint, bodyHash, stamp, signed, bodyHash)
	scope := day + "/us-east-1/s3/aws4_request"
	key := mac(mac(mac(mac([]byte("AWS4"+*secret), day), "us-east-1"), "s3"), "aws4_request")
	signature := hex.EncodeToString(mac(key, "AWS4-HMAC-SHA256\n"+stamp+"\n"+scope+"\n"+hexHash([]byte(canonical))))
	request, err := http.NewRequest(method, "http://"+*endpoint+path, bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	request.Header.Set("x-amz-date", stamp)
	request.Header.Set("x-amz-content-sha256", bodyHash)
	request.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential="+*access+"/"+scope+",SignedHeaders="+signed+",Signature="+signature)
	response, err := client.Do(request)
	if err != nil {
		return 0, err
	}
	defer response.Body.Close()
	_, err = io.Copy(io.Discard, response.Body)
	return response.StatusCode, err
}

func main() {
	flag.Parse()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 256, DisableCompression: true, WriteBufferSize: 1 << 16, ReadBufferSize: 1 << 16}}
	empty := hexHash(nil)
	if status, err := send(client, "PUT", "/"+*bucket, nil, empty); err != nil || (status != 200 && status != 409) {
		fmt.Fprintln(os.Stderr, "the bucket was not made:", status, err)
		os.Exit(1)
	}
	body := make([]byte, *size)
	rand.Read(body)
	bodyHash := hexHash(body)
	method := "PUT"
	if *op == "get" {
		method, body, bodyHash = "GET", nil, empty
	}
	latencies, failures := make([][]float64, *clients), make([]int, *clients)
	end := time.Now().Add(*duration)
	start := time.Now()
	var group sync.WaitGroup
	for number := 0; number < *clients; number++ {
		group.Add(1)
		go func(number int) {
			defer group.Done()
			for i := 0; time.Now().Before(end); i++ {
				path := fmt.Sprintf("/%s/%d/%d/%06d", *bucket, *size, number, i%*keys)
				begun := time.Now()
				status, err := send(client, method, path, body, bodyHash)
				if err != nil || status != 200 {
					failures[number]++
					continue
				}
				latencies[number] = append(latencies[number], float64(time.Since(begun).Microseconds())/1000)
			}
		}(number)
	}
	group.Wait()
	seconds := time.Since(start).Seconds()
	var all []float64
	errors := 0
	for number := range latencies {
		all = append(all, latencies[number]...)
		errors += failures[number]
	}
	sort.Float64s(all)
	if len(all) == 0 {
		fmt.Fprintln(os.Stderr, "nothing succeeded")
		os.Exit(1)
	}
	json.NewEncoder(os.Stdout).Encode(map[string]any{
		"operations": len(all), "errors": errors, "per_s": float64(len(all)) / seconds,
		"p50_ms": all[len(all)/2], "p99_ms": all[len(all)*99/100],
	})
}
