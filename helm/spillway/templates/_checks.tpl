{{/* What the schema cannot say. Every message names the value and the remedy. */}}
{{- define "spillway.checks" -}}
{{- $v := .Values }}
{{- $replicas := int $v.replicas }}
{{- $founders := int $v.founders }}
{{- $name := include "spillway.fullname" . }}
{{- if lt $replicas $founders }}
{{- fail (printf "replicas is %d and founders is %d: nodes that found the cluster must run. To try out a single node set both to 1; if the cluster is there and you removed founders from it, set founders to 0" $replicas $founders) }}
{{- end }}
{{- range $v.removedNodes }}
{{- if not (hasPrefix (printf "%s-" $name) .) }}
{{- fail (printf "removedNodes has %q, which is no node of this release; they are called %s-0, %s-1 and so on" . $name $name) }}
{{- end }}
{{- if lt (int (trimPrefix (printf "%s-" $name) .)) $replicas }}
{{- fail (printf "removedNodes has %q, and replicas: %d runs it: take it out of removedNodes, and delete its volume's claim (data-%s) before it runs again" . $replicas .) }}
{{- end }}
{{- end }}
{{- with lookup "apps/v1" "StatefulSet" .Release.Namespace $name }}
{{- range $ordinal := untilStep $replicas (int .spec.replicas) 1 }}
{{- $node := printf "%s-%d" $name $ordinal }}
{{- if not (has $node $v.removedNodes) }}
{{- fail (printf "replicas: %d would end node %s, which may still have replicas of shards. First `spillway cluster drain %s`, then `spillway cluster remove %s`, then add %q to removedNodes" $replicas $node $node $node $node) }}
{{- end }}
{{- end }}
{{- $was := get (default dict .metadata.annotations) "spillway/founders" }}
{{- if and $was (ne $founders 0) (ne $was (toString $founders)) }}
{{- fail (printf "founders is %d, and the cluster was founded with founders: %s. It never changes, except to 0 once the cluster is there" $founders $was) }}
{{- end }}
{{- end }}
{{- $needed := add $v.preStop.waitSeconds 20 }}
{{- if lt (int $v.terminationGracePeriodSeconds) (int $needed) }}
{{- fail (printf "terminationGracePeriodSeconds is %d; with preStop.waitSeconds %d it must be at least %d" (int $v.terminationGracePeriodSeconds) (int $v.preStop.waitSeconds) $needed) }}
{{- end }}
{{- if lt (int $v.preStop.waitSeconds) (int $v.preStop.settleSeconds) }}
{{- fail "preStop.settleSeconds is more than preStop.waitSeconds; raise the latter" }}
{{- end }}
{{- if not $v.tls.certManager.issuerRef }}
{{- if and $v.tls.clients.enabled (not $v.tls.clients.secretName) }}
{{- fail "tls.clients is enabled: name a secret (tls.clients.secretName) or an issuer of cert-manager (tls.certManager.issuerRef)" }}
{{- end }}
{{- if and $v.tls.clients.enabled $v.tls.clients.requireClientCertificate (not $v.tls.clients.clientSecretName) }}
{{- fail "tls.clients.requireClientCertificate is set: name a secret (tls.clients.clientSecretName) or an issuer of cert-manager (tls.certManager.issuerRef)" }}
{{- end }}
{{- if and $v.tls.peers.enabled (not $v.tls.peers.secretName) }}
{{- fail "tls.peers is enabled: name a secret (tls.peers.secretName) or an issuer of cert-manager (tls.certManager.issuerRef)" }}
{{- end }}
{{- end }}
{{- if and $v.auth.jwt.jwksSecret (eq $v.auth.mode "none") }}
{{- fail "auth.jwt.jwksSecret is set and auth.mode is none: set auth.mode to tokens" }}
{{- end }}
{{- if and $v.dispatcher.autoscaling.enabled (lt (int $v.dispatcher.autoscaling.maxReplicas) (int $v.dispatcher.autoscaling.minReplicas)) }}
{{- fail "dispatcher.autoscaling.maxReplicas is less than minReplicas" }}
{{- end }}
{{- if and $v.dispatcher.enabled (ne $v.auth.mode "none") (not $v.dispatcher.tokenSecret) }}
{{- fail "dispatcher.enabled and auth.mode are set: dispatchers need a token. Once the nodes run, `spillway token create dispatcher --lease '*' --admin '*'`, put it into a secret (key token), and name that with dispatcher.tokenSecret" }}
{{- end }}
{{- if not $v.allowInsecure }}
{{- $remedy := "or set allowInsecure: true, to try it out or where the network itself protects it" }}
{{- if not $v.tls.clients.enabled }}
{{- fail (printf "tls.clients is not enabled, so anybody on the way would read what clients send: set tls.clients.enabled, with a secret or an issuer of cert-manager, %s" $remedy) }}
{{- end }}
{{- if not $v.tls.peers.enabled }}
{{- fail (printf "tls.peers is not enabled, so whoever reaches the peers' port would be a node: set tls.peers.enabled, with a secret or an issuer of cert-manager, %s" $remedy) }}
{{- end }}
{{- if and (eq $v.auth.mode "none") (not $v.tls.clients.requireClientCertificate) }}
{{- fail (printf "nothing says who clients are: set auth.mode to tokens, or tls.clients.requireClientCertificate, %s" $remedy) }}
{{- end }}
{{- end }}
{{- end }}
