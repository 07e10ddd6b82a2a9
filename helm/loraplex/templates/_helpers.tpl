{{- define "loraplex.name" -}}
{{- /* KubeRay adds suffixes of its own: a RayService's name has at most 47 characters. */ -}}
{{- (contains "loraplex" .Release.Name | ternary .Release.Name (printf "%s-loraplex" .Release.Name)) | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "loraplex.labels" -}}
app.kubernetes.io/name: loraplex
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "loraplex.selector" -}}
app.kubernetes.io/name: loraplex
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "loraplex.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (.Values.serviceAccount.create | ternary (include "loraplex.name" .) "default") -}}
{{- end -}}

{{- define "loraplex.dataClaim" -}}
{{- .Values.storage.data.existingClaim | default (printf "%s-data" (include "loraplex.name" .)) -}}
{{- end -}}

{{- /* The platform's config as JSON, with what the chart sets. JSON, since large integers would become floats in Helm's YAML. */ -}}
{{- define "loraplex.platform" -}}
{{- $config := deepCopy .Values.platform -}}
{{- $serve := dict "gateways" .Values.gateways.replicas "gateway_resources" (dict "loraplex_gateway" 1) -}}
{{- $fixed := dict "data_dir" "/var/lib/loraplex" "admin_key_file" "/etc/loraplex/admin/key" "serve" $serve -}}
{{- $_ := set $fixed "listen" (dict "host" "0.0.0.0" "http_port" 8000 "grpc_port" 9000) -}}
{{- $_ := set $fixed "ray" (dict "address" "auto") -}}
{{- /* Ray's autoscaler brings pods for what is asked for, and groups that find no room are asked for only so. */ -}}
{{- $_ := set $fixed "controller" (dict "fleet" (dict "autoscale" .Values.autoscaling.enabled)) -}}
{{- with .Values.storage.artifactUrl }}{{ $_ := set $fixed "registry" (dict "artifact_url" .) }}{{ end -}}
{{- with .Values.storage.traceUrl }}{{ $_ := set $fixed "traces" (dict "url" .) }}{{ end -}}
{{- mergeOverwrite $config $fixed | toPrettyJson -}}
{{- end -}}

{{- /* The two applications of loraplex_deployments.serve_app, and how Serve listens. */ -}}
{{- define "loraplex.serveConfig" -}}
{{- $args := dict "config" (include "loraplex.platform" .) -}}
{{- if .Values.secrets.databaseUrl.name }}{{ $_ := set $args "database_url_file" "/etc/loraplex/database/url" }}{{ end -}}
{{- $quiet := dict "log_level" "WARNING" "enable_access_log" false -}}
{{- $servicers := list "loraplex.gateway.proto.loraplex_v1_pb2_grpc.add_LoraplexServicer_to_server" "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server" -}}
{{- $control := dict "name" "loraplex-control" "route_prefix" nil "import_path" "loraplex_deployments.serve_app:control" "args" $args -}}
{{- $gateways := dict "name" "loraplex" "route_prefix" "/" "import_path" "loraplex_deployments.serve_app:gateways" "args" $args -}}
{{- dict "proxy_location" "EveryNode" "http_options" (dict "host" "0.0.0.0" "port" 8000) "grpc_options" (dict "port" 9000 "grpc_servicer_functions" $servicers) "logging_config" $quiet "applications" (list $control $gateways) | toYaml -}}
{{- end -}}

{{- /* What Serve reads of its proxy and for its gateways, in every process of Ray: loraplex_deployments.proxy says why. */ -}}
{{- define "loraplex.env" -}}
{{- $maxOngoing := dig "serve" "max_ongoing_requests" 4096 .Values.platform | int -}}
{{- $haproxy := ne (dig "serve" "proxy" "haproxy" .Values.platform) "python" -}}
- {name: HOME, value: /home/loraplex}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, value: "loraplex_deployments.request_ids:middlewares"}
- {name: RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD, value: "0"}
- {name: RAY_SERVE_ENABLE_HA_PROXY, value: {{ $haproxy | ternary "1" "0" | quote }}}
{{- if $haproxy }}
- {name: RAY_SERVE_HAPROXY_BINARY_PATH, value: /opt/loraplex/bin/loraplex-haproxy}
- {name: RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S, value: "60"}
- {name: RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S, value: "5"}
- {name: RAY_SERVE_HAPROXY_NBTHREAD, value: {{ .Values.gateways.proxyThreads | quote }}}
# KubeRay starts Ray with 65,536 open files; a connection takes three.
- {name: RAY_SERVE_HAPROXY_MAXCONN, value: {{ min (mul 2 .Values.gateways.replicas $maxOngoing) (div 65536 3) | quote }}}
- {name: RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S, value: "3600"}
- {name: RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S, value: "3600"}
- {name: RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS, value: "1024"}
- {name: RAY_SERVE_HAPROXY_H2_BE_MAX_CONCURRENT_STREAMS, value: "1024"}
{{- end }}
{{- end -}}

{{- define "loraplex.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- /* A command that is sound when the node's own Ray answers, and with `serve` its proxy too. */ -}}
{{- define "loraplex.probe" -}}
{{- $raylet := "wget --tries 1 -T 4 -q -O- http://localhost:52365/api/local_raylet_healthz | grep -q success" -}}
{{- $gcs := "wget --tries 1 -T 4 -q -O- http://localhost:8265/api/gcs_healthz | grep -q success" -}}
{{- $proxy := "wget --tries 1 -T 4 -q -O- http://localhost:8000/-/healthz" -}}
exec:
  command:
    - bash
    - -c
    - {{ (eq . "gateway" | ternary (printf "%s && %s" $raylet $proxy) (eq . "head" | ternary (printf "%s && %s" $raylet $gcs) $raylet)) | quote }}
timeoutSeconds: 10
periodSeconds: 10
{{- end -}}

{{- /*
A pod template. Keys of the argument: root, component (head, gateway, worker), image, resources, nodeSelector, tolerations, affinity.
*/ -}}
{{- define "loraplex.pod" -}}
{{- $root := .root -}}
{{- $values := .root.Values -}}
{{- $head := eq .component "head" -}}
metadata:
  labels:
    {{- include "loraplex.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
spec:
  serviceAccountName: {{ include "loraplex.serviceAccount" $root }}
  {{- /* Ray's autoscaler, a container of the head, speaks to Kubernetes. */}}
  automountServiceAccountToken: {{ and $head $values.autoscaling.enabled }}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ $head | ternary 30 60 }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 10001
    runAsGroup: 10001
    fsGroup: 10001
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile: {type: RuntimeDefault}
  {{- with $values.image.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- else }}
  {{- if eq .component "gateway" }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "loraplex.selector" $root | nindent 10 }}
          app.kubernetes.io/component: gateway
  {{- end }}
  {{- end }}
  containers:
    - name: ray-{{ $head | ternary "head" "worker" }}
      image: {{ .image | quote }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      {{- if $head }}
      ports:
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        - {name: serve, containerPort: 8000}
      {{- else if eq .component "gateway" }}
      ports:
        - {name: http, containerPort: 8000}
        - {name: grpc, containerPort: 9000}
        - {name: gateway-metrics, containerPort: 30000}
      {{- end }}
      env:
        {{- include "loraplex.env" $root | nindent 8 }}
      {{- with $values.secrets.objectStore.name }}
      envFrom:
        - secretRef: {name: {{ . }}}
      {{- end }}
      resources:
        {{- toYaml .resources | nindent 8 }}
      securityContext:
        {{- include "loraplex.containerSecurity" $root | nindent 8 }}
      readinessProbe:
        {{- include "loraplex.probe" .component | nindent 8 }}
        failureThreshold: 3
      livenessProbe:
        {{- include "loraplex.probe" ($head | ternary "head" "worker") | nindent 8 }}
        initialDelaySeconds: 60
        failureThreshold: 12
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: home, mountPath: /home/loraplex}
        - {name: shared-mem, mountPath: /dev/shm}
        - {name: data, mountPath: /var/lib/loraplex}
        {{- if $values.storage.models }}
        - {name: models, mountPath: /models, readOnly: true}
        {{- end }}
        {{- if $head }}
        - {name: admin-key, mountPath: /etc/loraplex/admin, readOnly: true}
        {{- if $values.secrets.databaseUrl.name }}
        - {name: database-url, mountPath: /etc/loraplex/database, readOnly: true}
        {{- end }}
        {{- end }}
  volumes:
    - {name: tmp, emptyDir: {}}
    - {name: home, emptyDir: {}}
    - {name: shared-mem, emptyDir: {medium: Memory, sizeLimit: {{ $head | ternary "2Gi" (eq .component "gateway" | ternary "1Gi" "8Gi") }}}}
    {{- if $head }}
    - {name: data, persistentVolumeClaim: {claimName: {{ include "loraplex.dataClaim" $root }}}}
    - name: admin-key
      secret:
        secretName: {{ required "secrets.adminKey.name: name a Secret that holds the administrator's key" $values.secrets.adminKey.name }}
        defaultMode: 0440
        items:
          - {key: {{ $values.secrets.adminKey.key }}, path: key}
    {{- with $values.secrets.databaseUrl }}
    {{- if .name }}
    - name: database-url
      secret:
        secretName: {{ .name }}
        defaultMode: 0440
        items:
          - {key: {{ .key }}, path: url}
    {{- end }}
    {{- end }}
    {{- else }}
    - {name: data, emptyDir: {sizeLimit: {{ $values.storage.cacheSizeLimit }}}}
    {{- end }}
    {{- with $values.storage.models }}
    - name: models
      {{- toYaml . | nindent 6 }}
    {{- end }}
{{- end -}}
